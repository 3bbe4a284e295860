"""Puts together the filter's report, of which the card's figures are, from what its three scripts wrote.

    python train/gather_filter.py --training runs/filter/report.json --calibration runs/calibrated/report.json \
        --comparisons runs/first runs/second --output docs/filter/report.json

`runs/first` and `runs/second` are output folders of evaluate_filter.py, on seeds that nothing was settled on. What the
report at --output says of other comparisons, those that rules were settled on, is kept.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import write_json
from evaluate_filter import compare


SETTLED = "comparisons that rules were settled on"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", required=True, help="report.json of train_filter.py.")
    parser.add_argument("--calibration", required=True, help="report.json of calibrate_filter.py.")
    parser.add_argument("--comparisons", required=True, nargs="+", help="Output folders of evaluate_filter.py.")
    parser.add_argument("--output", required=True, help="The report, JSON.")
    args = parser.parse_args(argv)
    files = [args.training, args.calibration]
    files += [Path(folder) / name for folder in args.comparisons for name in ("report.json", "candidates.npz")]
    missing = [str(file) for file in files if not Path(file).is_file()]
    if missing:
        raise ValueError(f"There is no {', no '.join(missing)}.")
    return args


def read(path: str | Path) -> dict:
    """A report without arguments that are paths: they tell of the machine it ran on, not of what it did."""
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    report["arguments"] = {name: value for name, value in report["arguments"].items() if "/" not in str(value)}
    return report


def pooled(folders: list[str]) -> dict:
    """The filter's figures on the slots of all comparisons together."""
    off, on, each = [], [], []
    for folder in folders:
        with np.load(Path(folder) / "candidates.npz") as stored:
            chosen, wrong = torch.from_numpy(stored["chosen"]), torch.from_numpy(stored["wrong"])
        wrong = wrong.view(len(chosen), -1)  # [slots, candidates]
        off.append(wrong[:, 0])
        on.append(wrong.gather(1, chosen[:, None])[:, 0])
        each.append(wrong.double().mean(1))
    off, on, each = (torch.cat(parts) for parts in (off, on, each))
    figures = compare(off, on) | {"wrong without": round(off.double().mean().item(), 4), "n": len(off)}
    mean = each.mean().item()
    return figures | {"against the mean candidate": round(1 - on.double().mean().item() / mean, 4) if mean else None}


def main(argv=None) -> dict:
    args = parse_args(argv)
    output = Path(args.output)
    before = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    comparisons = []
    for folder in args.comparisons:
        report = read(Path(folder) / "report.json")
        comparisons.append({"seed": report["arguments"]["seed"], **report})
    seeds = [comparison["seed"] for comparison in comparisons]
    known = [c["seed"] for c in before.get(SETTLED, [])]
    if len(set(seeds)) < len(seeds) or set(seeds) & set(known):
        raise ValueError(f"The comparisons need seeds of their own, not {seeds}; rules were settled on {known}.")
    people = [comparison.pop("people", None) for comparison in comparisons]  # the same for all seeds
    report = {
        "training": read(args.training),
        "calibration": read(args.calibration),
        "comparisons": comparisons,
        "people": people[0],
        SETTLED: before.get(SETTLED, []),
        "fresh comparisons, pooled": pooled(args.comparisons),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    return report


if __name__ == "__main__":
    main()
