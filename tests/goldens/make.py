"""Write NAME.npz, what torch and transformers compute on the cases that NAME.py beside it lists, or all of them.

    python -m tests.goldens.make NAME|all        (with torch 2.13.0 and transformers 5.23.0 beside the project)
    python -m tests.goldens.make faster_rcnn     (with torch 2.13.0 and torchvision 0.28.0, without transformers)
    python -m tests.goldens.make yolox           (with torch 2.13.0 and what .lock/detectors.txt names)
    python -m tests.goldens.make yolov3          (with torch 2.13.0 and libreyolo 1.6.0, without transformers)

The default tests read the files with numpy alone (test_goldens.py).
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens import stored
from tests.parity.all_families import FAMILY

NAMES = ("clip", "conv_nets", "decoder", "encoder", "t5", "vit")


def arrays(name: str) -> dict[str, np.ndarray]:
    """Compute what a file is to hold."""
    file: Any = importlib.import_module(f"tests.goldens.{name}")
    if hasattr(file, "made"):  # of a peer that is not among transformers' models
        made: dict[str, np.ndarray] = file.made()
        return made
    if hasattr(file, "answers"):  # of a peer that lives in a process of its own
        answers: dict[str, np.ndarray] = file.answers()
        return answers
    found = dict(file.beside()) if hasattr(file, "beside") else {}
    for case in file.CASES:
        peer = FAMILY[case].peer(case)
        answer = FAMILY[case].theirs(case, peer)
        told, more = file.kept(case, peer, answer)
        weights = FAMILY[case].tensors(peer)
        found |= stored.entry(case, peer.config, weights, answer["gradients"], every=file.GOLDEN.every, **told)
        found |= {f"{case}/{what}": array for what, array in more.items()}
    return found


def main() -> None:
    """Write the files that the command line names."""
    for name in NAMES if sys.argv[1:] == ["all"] else sys.argv[1:]:
        file = Path(__file__).with_name(f"{name}.npz")
        np.savez_compressed(file, **arrays(name))  # type: ignore[arg-type]  # its keywords are arrays
        print(file.name, file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
