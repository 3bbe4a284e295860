"""pipeline.py: one file that holds what the package's modules do, and nothing by hand."""

from pathlib import Path

import pytest

import minim_pipeline
from minim_pipeline import __version__
from minim_pipeline.standalone import MODULES, inline, source_code


def test_it_is_what_a_saved_pipeline_takes_along(pipeline_dir):
    text = (pipeline_dir / "pipeline.py").read_text()
    assert text == source_code() and __version__ in text
    assert "minim_pipeline.pipeline_minim" not in text and "\nfrom ." not in text
    compile(text, "pipeline.py", "exec")


def test_every_line_of_the_modules_is_in_it():
    """But for imports, module docstrings, and what registers classes with diffusers."""
    text = source_code()
    for name in MODULES:
        module = (Path(minim_pipeline.__file__).parent / f"{name}.py").read_text()
        for part in ("class ", "def ", "    return ", "        raise "):
            for line in (line for line in module.splitlines() if line.startswith(part)):
                assert line in text, (name, line)


def test_modules_that_do_not_fit_in_one_file_are_refused():
    fits = {"a": '"""A."""\nimport math\nX = 1\n', "b": "import math\nfrom .a import X\n\n\ndef f():\n    return X\n"}
    namespace = {"__name__": "one", "__file__": __file__}
    text = inline(fits)
    exec(text.partition("\n# ----")[2].partition("\n\n\n")[2].replace("import math", ""), namespace)
    assert namespace["f"]() == 1 and text.count("import math") == 1
    with pytest.raises(ValueError, match="'X' is defined in b and in a"):
        inline(fits | {"b": "X = 2\n"})
    with pytest.raises(ValueError, match="'math', which b imports, is something else"):
        inline(fits | {"b": "import numpy as math\n"})
    with pytest.raises(ValueError, match="b imports 'f' from .c, which is not above it"):
        inline(fits | {"b": "from .c import f\n"})
    with pytest.raises(ValueError, match="b imports 'X' from .a"):
        inline(fits | {"b": "from .a import X as Y\n"})


def test_another_version_is_another_module():
    one, two = (inline({"a": f"X = {n}\n"}) for n in (1, 2))
    versions = [next(line for line in text.splitlines() if line.startswith("VERSION")) for text in (one, two)]
    assert versions[0] != versions[1] and inline({"a": "X = 1\n"}) == one
