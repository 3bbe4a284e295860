"""Puts together the filter's report, of which the card's figures are, from what its three scripts wrote.

    python research/gather_filter.py --training runs/filter/report.json --calibration runs/calibrated/report.json \
        --comparisons runs/first runs/second --output docs/filter/report.json

`runs/first` and `runs/second` are output folders of evaluate_filter.py, of one model and on seeds that nothing was
settled on. What the report at --output says of other comparisons, those that rules were settled on, is kept.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minim_pipeline.evaluation.judges import compare_wrong
from minim_pipeline.files import read_report, write_report
from minim_pipeline.training.config import Options, option, parse


SETTLED = "settled_comparisons"


@dataclass(kw_only=True)
class GatherConfig(Options):
    """What the filter's report is put together from."""

    training: str = option(help="report.json of train_filter.py.")
    calibration: str = option(help="report.json of calibrate_filter.py.")
    comparisons: list[str] = option(help="Two output folders of evaluate_filter.py.")
    output: str = option(help="The report, JSON.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.comparisons) != 2:
            raise ValueError(f"--comparisons has to be two folders, got {self.comparisons}.")
        files = [Path(self.training), Path(self.calibration)]
        files += [Path(folder) / name for folder in self.comparisons for name in ("report.json", "candidates.npz")]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"There is no {', no '.join(missing)}.")


def without_paths(report: dict) -> dict:
    """The report without arguments that are paths: they tell of the machine it ran on, not of what it did."""
    return report | {"arguments": {k: v for k, v in report["arguments"].items() if "/" not in str(v)}}


def read_comparisons(folders: list[str]) -> list[dict]:
    """What evaluate_filter.py found, with the `seed` taken out of the arguments.

    Raises:
        ValueError: more than the seed differs, of another model for instance.
    """
    reports = [read_report(Path(folder) / "report.json") for folder in folders]
    seeds = [report["arguments"].pop("seed") for report in reports]
    first, *others = ({k: v for k, v in r["arguments"].items() if k != "output_dir"} for r in reports)
    for other in others:
        names = [name for name in first | other if first.get(name) != other.get(name)]
        differ = [f"{name} is {first.get(name)!r} and {other.get(name)!r}" for name in names]
        if differ:
            raise ValueError(f"The comparisons may differ in their seeds only, but {'; '.join(differ)}.")
    return [{"seed": seed, **without_paths(report)} for seed, report in zip(seeds, reports, strict=True)]


def pooled(folders: list[str]) -> dict:
    """The filter's figures on the slots of all comparisons together."""
    off, on, each = [], [], []
    for folder in folders:
        with np.load(Path(folder) / "candidates.npz") as stored:
            if "chosen" not in stored:
                raise ValueError(f"{folder} was written before evaluate_filter.py kept its choices: run that again.")
            chosen, wrong = torch.from_numpy(stored["chosen"]), torch.from_numpy(stored["wrong"])
        wrong = wrong.view(len(chosen), -1)  # [slots, candidates]
        off.append(wrong[:, 0])
        on.append(wrong.gather(1, chosen[:, None])[:, 0])
        each.append(wrong.double().mean(1))
    off, on, each = (torch.cat(parts) for parts in (off, on, each))
    figures = compare_wrong(off, on) | {"wrong_without": round(off.double().mean().item(), 4), "n": len(off)}
    mean = each.mean().item()
    return figures | {"against_mean_candidate": round(1 - on.double().mean().item() / mean, 4) if mean else None}


def main(argv: list[str] | None = None) -> dict:
    config = parse(GatherConfig, argv, __doc__)
    output = Path(config.output)
    before = read_report(output) if output.is_file() else {}
    comparisons = read_comparisons(config.comparisons)
    seeds = [comparison["seed"] for comparison in comparisons]
    known = [c["seed"] for c in before.get(SETTLED, [])]
    if len(set(seeds)) < len(seeds) or set(seeds) & set(known):
        raise ValueError(f"The comparisons need seeds of their own, not {seeds}; rules were settled on {known}.")
    people = [comparison.pop("people", None) for comparison in comparisons]  # the same for all seeds
    report = {
        "training": without_paths(read_report(config.training)),
        "calibration": without_paths(read_report(config.calibration)),
        "comparisons": comparisons,
        "people": people[0],
        SETTLED: before.get(SETTLED, []),
        "fresh_comparisons_pooled": pooled(config.comparisons),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_report(output, report)
    return report


if __name__ == "__main__":
    main()
