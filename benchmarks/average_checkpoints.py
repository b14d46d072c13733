"""The mean of the weights of checkpoints that were fine-tuned from one start, as one checkpoint in float16.

    python benchmarks/average_checkpoints.py CHECKPOINT CHECKPOINT... OUTPUT [--shares 0.4 0.6]

The last two steps of qscorer-mini. Wortsman et al., "Model soups: averaging weights of multiple fine-tuned
models", ICML 2022.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pyiqa_qscorer.checkpoints.load import load_folder
from pyiqa_qscorer.checkpoints.save import save_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("output", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", help="of each checkpoint, which sum to 1; default: equal")
    arguments = parser.parse_args()
    count = len(arguments.checkpoints)
    shares = torch.tensor(arguments.shares or [1 / count] * count, dtype=torch.float64)
    if len(shares) != count or abs(float(shares.sum()) - 1) > 1e-9:
        raise SystemExit(f"--shares must be {count} numbers that sum to 1, got {arguments.shares}")
    loaded = [load_folder(folder, None, dtype="float32") for folder in arguments.checkpoints]
    states = [one.model.state_dict() for one in loaded]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise SystemExit("checkpoints must have the same network")
    mean = {
        name: torch.tensordot(shares, torch.stack([state[name] for state in states]).double(), 1) for name in states[0]
    }
    model = loaded[0].model
    model.load_state_dict(mean)
    print(save_folder(arguments.output, model.half(), loaded[0].tokenizer))


if __name__ == "__main__":
    main()
