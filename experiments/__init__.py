"""One paper or one stage per module; run with `python -m experiments.AREA.NAME --workdir DIR --KEY VALUE`."""
