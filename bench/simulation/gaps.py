"""What a twin does not speak. Loud, so that no simulation means something else than the product."""


class NotTwinned(Exception):
    """The real server knows this; the twin has to learn it first."""
