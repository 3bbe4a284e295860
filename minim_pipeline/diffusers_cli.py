"""`diffusers-cli` that knows `MinimPipeline`: `python -m minim_pipeline.diffusers_cli run --model FOLDER ...`.

The command of diffusers imports no package but its own, and finds no class of another.
"""

from diffusers.commands.diffusers_cli import main

from . import pipeline_minim  # noqa: F401  registers the class


if __name__ == "__main__":
    main()
