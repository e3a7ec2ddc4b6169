"""Names of a classifier's classes, for the forms of all families."""

LABELS = {"id2label": {"0": "bad", "1": "good", "2": "so so"}, "label2id": {"bad": 0, "good": 1, "so so": 2}}
