"""`python -m bench chaos`: faults on real processes under load, and a verdict on every message.

reliability.md section 6 is the plan.

`campaign` is the door. `rig` holds everything that runs, `faults` the rows of the fault matrix, `nemesis` chooses and
applies them, `crowd` is the load (a process of its own) with `handset` as its phones, `links` the proxies in between
(another one), `recovery` says when all was well again, `report` shows it.
"""
