"""Under which license weights are: what is made from them inherits it, through any number of generations."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download, metadata_load


LICENSE_FIELDS = ("license", "license_name", "license_link")


def license_of(model: str | Path) -> dict[str, str] | None:
    """The license of a model's weights: what its `model_index.json` has inherited, or else what its card says.

    Args:
        model: a folder, or an id on the Hub.

    Returns:
        `license`, and `license_name` and `license_link` if there are any, as in a card's front matter; `of`: the name
        of the model whose license it is. `None` if nothing says.
    """
    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        inherited = json.loads(index.read_text(encoding="utf-8")).get("weights_license") if index.is_file() else None
        if inherited:
            return inherited
        name, card = folder.resolve().name, folder / "README.md"
    else:
        try:
            name, card = str(model), Path(hf_hub_download(str(model), "README.md"))
        except (OSError, ValueError):
            return None
    said = (metadata_load(card) if card.is_file() else None) or {}
    if said.get("license") in (None, "unknown"):
        return None
    return {field: said[field] for field in LICENSE_FIELDS if said.get(field)} | {"of": name}
