"""What pytest does not look at: modules for Triton where there is none."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["src/kullback/divergence/triton_*.py"]
