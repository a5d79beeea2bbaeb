"""The HTTP service: an app on Ray Serve (app.py), its routes, its search page, its config."""

import os

# Before torch is imported: else its threads, while they wait, take turns of the cores that the ingress needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
