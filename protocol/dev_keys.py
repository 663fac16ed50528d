"""The keys of `TRIREME_ENV=dev`, so that a fresh checkout signs and verifies tokens without configuration.

Public by design: a process in any other environment refuses to start without keys of its own (RFC 8037 JWK).
"""

from typing import Final

PRIVATE_JWK: Final = (
    '{"crv":"Ed25519","x":"_o4oMholVIA8rYorw7HPv7PoCR0WMWAU9En_iSZs5x4",'
    '"d":"SHQyuYw5mVfR1_GM_yyZZXlAkrF5UEqFVzEe43YejLo","kid":"dev","kty":"OKP"}'
)
PUBLIC_JWK: Final = '{"crv":"Ed25519","x":"_o4oMholVIA8rYorw7HPv7PoCR0WMWAU9En_iSZs5x4","kid":"dev","kty":"OKP"}'
PUBLIC_X: Final = "_o4oMholVIA8rYorw7HPv7PoCR0WMWAU9En_iSZs5x4"
"""The public half itself: the key is recognised by it, whatever else its JWK says."""
ADMIN_TOKEN: Final = "dev-admin"
S3_URL: Final = "http://127.0.0.1:8333"
S3_ACCESS_KEY: Final = "trireme-dev"
S3_SECRET_KEY: Final = "trireme-dev-secret"
"""Of the local object store that `bench services` starts."""
VAPID_PRIVATE_KEY: Final = "qWUm2iTfBUNsfu0ppz_oBX6lmDFlEyqzs7lmovRsh0Y"
VAPID_SUBJECT: Final = "mailto:dev@localhost"
"""Who a development system is to Web Push services (RFC 8292)."""
