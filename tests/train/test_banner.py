"""What a run says of itself before its first step."""

from __future__ import annotations

from train.banner import banner
from train.compose import compose
from train.data.rows.blend import Exposure


def test_the_published_job_introduces_itself() -> None:
    """Sizes as DeepSeek-V3's report has them: 671 B parameters, 14.8 T tokens, 2048 ranks."""
    config = compose(["experiment=v3_h800_2048"])
    lines = banner(config, "cuda:0 (H800)", 8, "transformer_engine", [Exposure("web", 1.0, 10, 0.9)], 0).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "ranks", "recipe", "data"]
    assert "671B parameters, 36.6B activated" in lines[0] and "8 of 256 experts per token" in lines[0]
    assert "2048 = pp 16 x dp 128, dualpipe" in lines[1] and "on cuda:0 (H800); fp8" in lines[1]
    assert "14.8T in all" in lines[2] and "12.6M to 62.9M tokens" in lines[2]
    assert "web 0.9 epochs" in lines[3] and config.run.dir in lines[3]
    assert all(len(line) < 240 for line in lines)


def test_a_resumed_run_on_one_process_says_where_it_goes_on() -> None:
    config = compose(["train.max_steps=30"])
    exposures = [Exposure("web", 0.75, 10, 2.0), Exposure("code", 0.25, 10, 0.031)]
    model, ranks, recipe, note, data = banner(config, "cpu", 3, "torch", exposures, 12).splitlines()
    assert ranks.split()[1:4] == ["1", "on", "cpu,"] and "3 threads each" in ranks
    assert "from step 13 on, 30 steps of" in recipe
    assert note.startswith("note ") and "before the warm-up" in note
    assert "web 75.0% 2 epochs, code 25.0% 0.031 epochs" in data
    assert "activated per token" in model
