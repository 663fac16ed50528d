"""Role `push`: people whose devices have confirmed nothing are told by push that there is something.

`role` (claims what is due) → `looks` (who is to hear of which message) → `dispatch` (tries, breakers) → an adapter for
each kind of token. A push carries ids and a badge, never what was said.
"""
