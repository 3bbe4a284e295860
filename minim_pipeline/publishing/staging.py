"""A folder with all that is uploaded: weights twice, code, card, report, and sample pictures."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import write_report
from ..provenance import save_png
from .card import Sample, complete
from .reports import count_parts


VARIANT = "fp16"


def stage(pipe, folder: Path, repo_id: str, card: ModelCard, report: dict, page: Path | None, samples: int) -> None:
    """Writes everything into the empty `folder`.

    Args:
        report: sections as in `reports.SECTIONS`; empty for none.
        page: the evaluation report's page, if there is one.
        samples: pictures of each modality, drawn with the model's own settings from seed 0 on; none is picked.
    """
    # One file a component: shards are for models of many gigabytes, and would keep their names in the variant.
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    for path in sorted(folder.glob("*/*.safetensors")):
        # Thresholds hold for the head as it is; it is small, and loads in fp32 with either variant.
        if path.parent.name != "filter_head":
            save_half(path, path.with_name(f"{path.stem}.{VARIANT}.safetensors"))
    if report:
        report = {"parts": count_parts(folder)} | {name: part for name, part in report.items() if name != "parts"}
        write_report(folder / "report.json", report)
    if page is not None:
        (folder / "evaluation").mkdir()
        shutil.copyfile(page, folder / "evaluation" / "report.html")
    drawn = draw_samples(pipe, folder / "samples", repo_id, samples)
    readme = complete(card, repo_id, report, drawn, pipe.filter_head is not None)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def save_half(source: Path, target: Path) -> None:
    """Writes the weights of one safetensors file to another, floating-point numbers as fp16."""
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    save_file({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, target, metadata=metadata)


def draw_samples(pipe, folder: Path, repo_id: str, count: int) -> list[Sample]:
    """Draws `count` pictures of each trained modality, of its findings in turn; a base model has none to show."""
    samples = []
    for name in (pipe.config.modalities or []) if count else []:
        findings = (pipe.config.findings or {}).get(name) or [pipe.resolve_prompts(None, name, 1)[1][0].words]
        prompts = [findings[i % len(findings)] for i in range(count)]
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        output = pipe(prompts, modality=name, generator=generators)
        folder.mkdir(exist_ok=True)
        for i, (image, prompt) in enumerate(zip(output.images, prompts)):
            metadata = {"model": repo_id, "modality": name, "prompt": prompt, "seed": output.seeds[i]}
            metadata |= {"steps": pipe.num_timesteps, "guidance": pipe.guidance_scale}
            metadata |= {"score": output.scores[i], "accepted": output.accepted[i]}
            path = folder / f"{name}-{i}.png"
            save_png(image, path, metadata)
            samples.append(Sample(f"samples/{path.name}", name, prompt))
    return samples
