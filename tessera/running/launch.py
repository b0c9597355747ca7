"""A stage as several processes: torchrun's own launcher, told how many by the environment, so that dvc.yaml is for any machine.

TESSERA_PROCESSES=auto         one on each GPU; a number: so many. TESSERA_PROCESSES_TRAIN_PRIOR is of that stage alone
TESSERA_NODES=2                machines; each runs the same command, with the number of its own in TESSERA_NODE, from 0
TESSERA_RENDEZVOUS=host:29500  where the processes of all machines meet: a port of machine 0
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from tessera.artifacts.background import num_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from tessera.nn.processes import Processes

# The stages whose work can be shared
SHARED = ("train_features", "train_tokenizer", "train_prior", "encode_tokens", "sample_images")
Item, Made = TypeVar("Item"), TypeVar("Made")
LAUNCHED = "TESSERA_LAUNCHED"  # set for the processes that `launch` starts
PATIENCE = 300  # seconds for a checkpoint, when all are asked to stop
LOST = "another process of this stage is gone"


class Launch(NamedTuple):
    processes: int  # on this machine
    nodes: int = 1
    node: int = 0
    rendezvous: str = ""  # HOST:PORT

    @property
    def is_one(self) -> bool:
        return self.processes == self.nodes == 1


def asked(stage: str, gpus: int | None = None) -> Launch:
    """What the environment asks for, on a machine with so many GPUs (None: torch knows).

    Raises ValueError for what cannot be.
    """
    if stage not in SHARED or is_rank():
        return Launch(1)
    key = f"TESSERA_PROCESSES_{stage.upper()}"
    key = key if key in os.environ else "TESSERA_PROCESSES"
    text = os.environ.get(key) or "1"
    processes = max(1, _number_of_gpus() if gpus is None else gpus) if text == "auto" else _whole(key, text, 1)
    nodes = _whole("TESSERA_NODES", os.environ.get("TESSERA_NODES") or "1", 1)
    if nodes == 1:
        return Launch(processes)
    node = _whole("TESSERA_NODE", os.environ.get("TESSERA_NODE") or "", 0)
    rendezvous = os.environ.get("TESSERA_RENDEZVOUS", "")
    if node >= nodes or not rendezvous.rpartition(":")[0] or not rendezvous.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"TESSERA_NODES is {nodes}, TESSERA_NODE {node} and TESSERA_RENDEZVOUS {rendezvous!r}: expected a node from 0 to "
            f"{nodes - 1} and HOST:PORT, the same on all machines, of a port of machine 0"
        )
    return Launch(processes, nodes, node, rendezvous)


def is_rank() -> bool:
    """Whether this process is one of several already, by `launch` or by a torchrun of somebody's own."""
    return "RANK" in os.environ


def rank() -> int:
    """Of this process, 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def number() -> int:
    """Of the processes of this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def part(items: Sequence[Item]) -> Sequence[Item]:
    """Those of the items that `share` gives to this process."""
    return _processes().part(items)


def share(items: Sequence[Item], work: Callable[[Item], Made]) -> Iterator[Made]:
    """work(item) of all items, in order, in the first process; each works on its part, and the others yield nothing."""
    return _processes().in_order(items, work)


def from_main(value: Made) -> Made:
    """What the first process gives, in all of them; what the others give is not looked at."""
    return _processes().from_main(value)


@cache
def _processes() -> "Processes":
    """Those of this stage."""
    import torch.distributed as dist

    from tessera.nn.processes import Processes

    if is_rank() and not dist.is_initialized():
        dist.init_process_group("gloo")
    return Processes(number())


def use_device() -> None:
    """Let this process compute on the GPU of its number, as the others of this machine do on theirs."""
    import torch

    if is_rank() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def launch(name: str, command: list[str], wanted: Launch) -> int:
    """Run `python -m tessera.running COMMAND` as these processes; the exit code of the stage.

    One that fails ends all, with its sentence.
    """
    import logging

    from torch.distributed.elastic.agent.server.api import logger as of_agents
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for logger in (of_agents, *(logging.getLogger(f"torch.distributed.{part}") for part in ("elastic", "launcher"))):
        logger.setLevel(logging.CRITICAL + 1)  # they tell of every failure in forty lines
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // wanted.processes)))
    config = LaunchConfig(
        min_nodes=wanted.nodes,
        max_nodes=wanted.nodes,
        nproc_per_node=wanted.processes,
        run_id=name,
        max_restarts=0,
        rdzv_backend="static" if wanted.nodes > 1 else "c10d",
        rdzv_endpoint=wanted.rendezvous or "localhost:0",
        rdzv_configs={"rank": wanted.node, "timeout": 900} if wanted.nodes > 1 else {},
        shutdown_timeout=PATIENCE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tessera.running", *command)
    except ChildFailedError as failed:
        return _told(name, failed.failures, wanted.processes * wanted.nodes)
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


def _told(name: str, failures: dict[int, "ProcessFailure"], processes: int) -> int:
    """Say why the stage failed, once; its exit code."""
    number, cause = min(failures.items(), key=lambda each: (LOST in _sentence(each[1]), each[1].timestamp))
    if cause.exitcode < 0:
        killed = signal.Signals(-cause.exitcode).name
        print(
            f"{name} failed: process {number} of {processes} was ended by {killed}, and the others with it; possibly memory "
            "was not enough. The same command continues from the last checkpoint",
            file=sys.stderr,
        )
        return 128 - cause.exitcode
    if sentence := _sentence(cause):
        print(f"{name} failed: {sentence}", file=sys.stderr)
    return cause.exitcode


def _sentence(cause: "ProcessFailure") -> str:
    """What a process recorded; without it, it has told of its failure itself, or could not."""
    found = cause.error_file_data.get("message") if isinstance(cause.error_file_data, dict) else None
    return found["message"] if isinstance(found, dict) else ""


def record(sentence: str) -> bool:
    """Hand the sentence of a failure to `launch`, which says it once for all processes. False: nobody is there to say it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if LAUNCHED not in os.environ or not path:
        return False
    known = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(path).write_text(json.dumps(known), encoding="utf-8")
    return True


def is_lost(error: BaseException) -> bool:
    """Whether it is what a process sees when another one that it works with has ended."""
    text = str(error)
    return is_rank() and isinstance(error, RuntimeError) and any(name in text for name in ("gloo", "NCCL", "TCPStore"))


def _whole(key: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        expected = "auto, or how many processes share a stage" if "PROCESSES" in key else f"a number from {least}"
        raise ValueError(f"{key} is {text!r}: expected {expected}; correct it")
    return int(text)


def _number_of_gpus() -> int:
    import torch

    return torch.cuda.device_count()
