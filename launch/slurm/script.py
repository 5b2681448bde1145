"""The text of the batch script: what Slurm reads of it, what the ranks are started with, and what follows each end."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from launch.slurm.config import SlurmConfig
from launch.slurm.snapshot import CODE, CONFIG, LOG
from train.config import RunConfig

# Ports of the ranks' meetings: below those that systems hand out, and seldom the same for two jobs of one machine.
FIRST_PORT, NUM_PORTS = 15000, 15000
# How often ranks are asked to save while they live: one that was just starting has not heard the first time.
ASK_INTERVAL_S = 3

_SCRIPT = """\
#!/bin/bash
# The run {name}, as `python -m launch slurm` has queued it: {num_nodes} x {ranks_per_node} ranks. It runs the code and
# the config that lie beside this script; a checkout that is edited meanwhile changes nothing.
{options}

folder={folder}
export PYTHONPATH="$folder/{code}" PYTHONSAFEPATH=1
python={python}
{setup}
# A job of a chain that finds the run at its end has nothing to do.
if [ -e "$folder/ended" ]; then cat "$folder/ended"; exit 0; fi

# Slurm tells this script, and nobody else, that its time comes to an end (--signal=B:). It asks the ranks, which save
# and end. torchrun would die of SIGUSR1, and kill its ranks 30 s after a SIGTERM: it is started deaf to both (below).
ask() {{ scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null; }}
asked=
trap 'asked=yes; ask' USR1 TERM

attempt=0
while :; do
  "$python" -m launch.slurm.on_node begin "$folder" "$attempt" || exit
  port=$(({first_port} + (SLURM_JOB_ID * 16 + attempt) % {num_ports}))
  srun --nodes={num_nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 \\
    bash -c 'trap "" USR1 TERM; exec "$@"' torchrun "$python" -m torch.distributed.run \\
    --nnodes={num_nodes} --nproc-per-node={ranks_per_node} --max-restarts=0 --signals-to-handle=SIGINT \\
    --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$port" --rdzv-id="$SLURM_JOB_ID.$attempt" \\
    -m train --config "$folder/{config}" &
  step=$!
  # `wait` returns for a signal too. Asked once, the ranks are asked again: one that was starting has not heard it.
  while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    [ -z "$asked" ] || {{ sleep {ask_interval_s} & wait $!; ask; }}
  done
  wait "$step"; code=$?
  # A word: again (start the ranks once more, after a wait), requeue (go on in another job), or end.
  read -r word value < <("$python" -m launch.slurm.on_node end "$folder" "$code" "${{asked:-no}}")
  case $word in
    again) [ -z "$asked" ] || exit "$code"; sleep "$value" & wait $!; attempt=$((attempt + 1)) ;;
    requeue) {requeue} ;;
    *) exit "${{value:-1}}" ;;
  esac
done
"""


def script(config: RunConfig, slurm: SlurmConfig, folder: Path, submitted_from: Path) -> str:
    """The batch script of a run.

    Args:
        folder: the job's own, with code and config, absolute.
        submitted_from: the folder that the run's relative paths begin at.
    """
    setup = "".join(f"{line}\n" for line in slurm.setup)
    return _SCRIPT.format(
        name=" ".join(config.run.name.split()),
        num_nodes=config.parallel.nodes,
        ranks_per_node=config.parallel.ranks_per_node,
        options="\n".join(f"#SBATCH {each}" for each in _options(config, slurm, folder, submitted_from)),
        folder=shlex.quote(str(folder)),
        code=CODE,
        config=CONFIG,
        python=shlex.quote(slurm.python or sys.executable),
        setup=setup,
        first_port=FIRST_PORT,
        num_ports=NUM_PORTS,
        ask_interval_s=ASK_INTERVAL_S,
        requeue='scontrol requeue "$SLURM_JOB_ID"; exit 0' if slurm.requeue else "exit 0",
    )


def _options(config: RunConfig, slurm: SlurmConfig, folder: Path, submitted_from: Path) -> list[str]:
    """What Slurm reads of the script."""
    found = [
        f"--job-name={job_name(config.run.name)}",
        f"--nodes={config.parallel.nodes}",
        "--ntasks-per-node=1",
        *(f"--{key}={value}" for key in ("partition", "account", "qos", "time") if (value := getattr(slurm, key))),
    ]
    if num_gpus := slurm.num_gpus_per_node(config):
        found.append(f"--gpus-per-node={num_gpus}")
    return [
        *found,
        f"--signal=B:USR1@{slurm.signal_s}",
        "--requeue" if slurm.requeue else "--no-requeue",
        f"--chdir={_quoted(submitted_from)}",
        f"--output={_quoted(folder / LOG)}",
        "--open-mode=append",
        *slurm.option,
    ]


def job_name(run_name: str) -> str:
    """A run's name as a job's, which is one word."""
    return re.sub(r"[^\w.=-]+", "-", run_name).strip("-") or "run"


def _quoted(path: Path) -> str:
    """As sbatch reads options of a script: quoted where there are spaces; a percent sign is one where it is doubled."""
    text = str(path).replace("%", "%%") if path.name == LOG else str(path)
    return f'"{text}"' if re.search(r"\s", text) else text
