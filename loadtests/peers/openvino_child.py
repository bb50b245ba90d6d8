"""OpenVINO GenAI as a child process; run by ``Worker`` under an interpreter that has it.

One ``generate()`` of the continuous-batching pipeline takes the adapters of its first request and
serves all others with them too, without a word. So requests are grouped by adapter, and the groups
run one after the other, each as one batch of at most ``concurrency``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as genai
from child import Serve, main
from openvino import Tensor


def build(setup: dict[str, Any]) -> Serve:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.max_num_seqs = 256
    scheduler.enable_prefix_caching = False
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "INFERENCE_NUM_THREADS": setup["threads"],
    }
    adapters = [_adapter(Path(path)) for path in setup["adapters"]]
    if adapters:
        properties["adapters"] = genai.AdapterConfig(adapters)
    pipeline = genai.ContinuousBatchingPipeline(setup["base"], scheduler, "CPU", properties)

    def configure(job: dict[str, Any]) -> Any:
        config = genai.GenerationConfig()
        config.do_sample = False
        config.ignore_eos = True
        config.max_new_tokens = config.min_new_tokens = job["num_new"]
        if adapters:
            mine = [adapters[job["adapter"]]] if job["adapter"] >= 0 else []
            config.adapters = genai.AdapterConfig(mine)
        return config

    def serve(jobs: list[dict[str, Any]], concurrency: int) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault(job["adapter"], []).append(index)
        outputs: list[list[int]] = [[] for _ in jobs]
        for group in groups.values():
            for start in range(0, len(group), concurrency):
                some = group[start : start + concurrency]
                results = pipeline.generate(
                    [Tensor(np.array([jobs[index]["prompt"]])) for index in some],
                    [configure(jobs[index]) for index in some],
                )
                for index, result in zip(some, results, strict=True):
                    outputs[index] = [int(token) for token in result.m_generation_ids[0]]
        return outputs

    return serve


def _adapter(folder: Path) -> Any:
    """GenAI reads the weights alone, so what the config says must be the scale of 1 it assumes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["lora_alpha"] != config["r"]:
        raise ValueError(f"{folder}: lora_alpha / r is not 1")
    return genai.Adapter(str(folder / "adapter_model.safetensors"))


if __name__ == "__main__":
    main(build)
