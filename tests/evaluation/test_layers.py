"""What measures a model is imported by what trains it, and never the other way round."""

import re

from conftest import ROOT


def test_the_evaluation_imports_nothing_of_the_trainers():
    files = sorted((ROOT / "minim_pipeline" / "evaluation").glob("*.py"))
    wrong = re.compile(r"(from|import) (\.\.|minim_pipeline\.)training")
    found = [file.name for file in files if wrong.search(file.read_text())]
    assert len(files) > 10 and found == []
