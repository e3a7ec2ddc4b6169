"""One paper or one stage a module; run with `python -m experiments.NAME --workdir DIR --KEY VALUE`."""
