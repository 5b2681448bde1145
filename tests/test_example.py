"""The worked example: every command of docs/example.md runs, and what comes out is a model that others can load."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch.__main__ import VERBS
from tests.test_first_hour import END, commands, environment, mismatch, script

PAGE = Path(__file__).resolve().parent.parent / "docs" / "example.md"
EXPORT = 'python -m launch export checkpoint="$best"/checkpoints/step-00000008 to=my-model'


def test_the_example_does_what_it_shows(tmp_path: Path) -> None:
    page = commands(PAGE.read_text())
    folder = tmp_path / "example"
    folder.mkdir()
    steps = script(page) + (EXPORT if "export" in VERBS else "")
    done = subprocess.run(
        ["bash", "-c", steps],
        cwd=folder,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    outputs = re.split(rf"^{END} (\d+)\n", done.stdout, flags=re.M)
    assert len(outputs) == 2 * len(page) + 1, done.stdout[-2000:]
    for command, output, code in zip(page, outputs[::2], outputs[1::2], strict=False):
        assert code == "0", f"$ {command.text}\n{output}"
        missing = mismatch(command.expected, output)
        assert missing is None, f"not printed: {missing}\n$ {command.text}\n{output}"
    if "export" not in VERBS:
        pytest.skip("all but the last step: there is no verb `export` yet")
    import transformers

    assert done.returncode == 0, outputs[-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "my-model")
    assert model.config.hidden_size == 64
