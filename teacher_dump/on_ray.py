"""Workers of one dump as Ray tasks, on this machine or a cluster whose nodes see the folder under one path.

Each task is a dump like any other: it claims shards until none is left (store/shared.py). One whose process dies is
started again by Ray, and what it held is claimed by whoever comes first.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from ..store.errors import ConfigError, PredistillError
from .config import DumpConfig

RETRIES = 3  # of a worker that died


def dump_on_ray(config: DumpConfig) -> dict[str, Any]:
    """What `dump` returns, of `config.ray_workers` workers: teacher_seconds are added up, seconds are the whole time.

    A GPU each where the cluster has any, else a CPU. Uses the Ray that is there, or at RAY_ADDRESS, or starts one and
    ends it. Raises ConfigError without the library ray, and whatever a worker raised.
    """
    ray: Any = _ray()
    workers, began, started = int(config.ray_workers or 1), time.perf_counter(), not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, logging_level="ERROR")
    try:
        asked = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
        worker = ray.remote(max_retries=RETRIES, **asked)(work)
        found = ray.get([worker.remote(replace(config, ray_workers=None)) for _ in range(workers)])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, PredistillError) else error from error
    except ray.exceptions.WorkerCrashedError as error:
        raise PredistillError(f"a worker died {RETRIES + 1} times; run the same dump again to go on") from error
    finally:
        if started:
            ray.shutdown()
    seconds, tokens = time.perf_counter() - began, sum(one["tokens_per_second"] * one["seconds"] for one in found)
    return {
        **found[0], "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1),
        "teacher_seconds": round(sum(one["teacher_seconds"] for one in found), 3),
    }  # fmt: skip


def work(config: DumpConfig) -> dict[str, Any]:
    """One worker."""
    from .dump import dump

    return dump(config)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray-workers needs the library ray: pip install predistill[ray]") from error
    return ray
