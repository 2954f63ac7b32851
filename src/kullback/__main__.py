"""`python -m kullback`, which launchers of several processes need: `accelerate launch -m kullback train RECIPE`."""

from kullback.cli import app

app(prog_name="kullback")
