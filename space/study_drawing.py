"""The images of studies that begin with a file of prompts: drawn by the Space's model, as `minim generate` does."""

import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from minim_pipeline.generate.options import GenerateOptions
from minim_pipeline.generate.plan import Request, count_images, expand, request_file
from minim_pipeline.generate.write import generate
from minim_pipeline.loading import register_modalities


MOST_DRAWN = 2000  # images


class Prompts:
    """Files of prompts (`Text,modality`, optional `num_images,seed`), and the model that draws them.

    Args:
        files: by the names that a host sees.
        model: folder or Hub id of a pipeline.
    """

    def __init__(self, files: Mapping[str, Path], model: str):
        self.files, self.model = files, model
        self.turn = threading.Lock()  # one study after the other

    def requests(self, name: str) -> list[Request]:
        """What a file asks for; ValueError if it is no such file, or asks for more than `MOST_DRAWN` images."""
        try:
            trained = register_modalities(self.model).get("modalities") or None
            found = request_file(self.files[name], 1, 0, trained)
        except (ValueError, OSError) as error:  # it has paths of this machine, which are not for a page
            print(f"space/app.py: {self.files[name]} cannot be read: {error}", file=sys.stderr)
            raise ValueError(f"The prompts {name} cannot be read; the server's log says why.") from error
        if count_images(found) > MOST_DRAWN:
            raise ValueError(f"{name} asks for {count_images(found)} images, at most {MOST_DRAWN} are drawn here.")
        return found

    def draw(self, name: str, folder: Path) -> None:
        """Draws what is missing in the folder; raises as `requests` and `generate`."""
        with self.turn:
            generate(expand(self.requests(name)), folder, GenerateOptions(model=self.model, quiet=True))
