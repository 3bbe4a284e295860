"""`diffusers.AutoPipelineForText2Image` finds `MinimPipeline`: it is put into diffusers' table of classes.

That table is in a module that imports all of diffusers' pipelines, seconds that nobody else should wait for. So the
entry is made when somebody imports the module, or at once if that has happened already.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder


TABLE_MODULE = "diffusers.pipelines.auto_pipeline"


def add_to_table() -> None:
    """Adds the class to diffusers' table."""
    from .pipeline_minim import MinimPipeline

    sys.modules[TABLE_MODULE].AUTO_TEXT2IMAGE_PIPELINES_MAPPING["minim"] = MinimPipeline


class TableLoader(Loader):
    """Loads the module with the table as its own loader does, and adds the class."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        add_to_table()


class TableFinder(MetaPathFinder):
    """Finds the module with the table and no other."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != TABLE_MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = TableLoader(spec.loader)
        return spec


if TABLE_MODULE in sys.modules:
    add_to_table()
else:
    sys.meta_path.insert(0, TableFinder())
