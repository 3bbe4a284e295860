"""`diffusers.AutoPipelineForText2Image` finds `MinimPipeline`: it is put into diffusers' table of classes.

That table is in a module that imports all of diffusers' pipelines, seconds that nobody else should wait for. So the
entry is made when somebody imports the module, or at once if that has happened already.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder


TABLE_MODULE = "diffusers.pipelines.auto_pipeline"


def add_to_table() -> None:
    """Adds the class to diffusers' table."""
    from .pipeline_minim import MinimPipeline

    sys.modules[TABLE_MODULE].AUTO_TEXT2IMAGE_PIPELINES_MAPPING["minim"] = MinimPipeline


class TableFinder(MetaPathFinder):
    """Finds the module with the table and no other, and adds the class once that is loaded."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == TABLE_MODULE else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_add(module) -> None:
                load(module)
                add_to_table()

            spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


if TABLE_MODULE in sys.modules:
    add_to_table()
else:
    sys.meta_path.insert(0, TableFinder())
