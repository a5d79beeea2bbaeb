"""The HTTP service: an application on Ray Serve (app.py), its routes, search page and configuration."""

import os

# Must be set before torch is imported: spinning OpenMP threads would take the cores that the ingress needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
