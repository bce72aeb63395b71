"""The summary of a run on a terminal: which engine serves and why, without opening the report."""

from __future__ import annotations

from typing import Any

from flows.training.summary import told


def _engine(p50: float) -> dict[str, Any]:
    accuracy = {"value": 0.95, "low": 0.86, "high": 0.98, "n": 60}
    return {
        "metrics": {"accuracy": accuracy},
        "latency_ms": {"p50": p50, "p90": p50, "p99": p50, "n": 100},
        "size_bytes": 5_000_000,
    }


def test_a_pass_says_why_this_engine_serves_and_why_others_cannot() -> None:
    def finding(engine: str, of: str, gate: str, status: str, message: str) -> dict[str, str]:
        return {"engine": engine, "engine_status": of, "gate": gate, "status": status, "message": message}

    summary: dict[str, Any] = {
        "outcome": "candidate",
        "verdict": "pass",
        "model": "photographs",
        "version": "1",
        "reasons": [],
        "data": {"version": "v", "kept": 300, "quarantined": 0, "splits": {"train": 200}, "warnings": []},
        "engines": {"onnxruntime-fp32": _engine(6.0), "openvino-fp32": _engine(7.0), "openvino-int8": _engine(5.0)},
        "serving_engine": "onnxruntime-fp32",
        "findings": [
            finding("onnxruntime-fp32", "pass", "accuracy", "pass", "0.95, floor 0.85"),
            finding("onnxruntime-fp32", "pass", "serving", "pass", "the fastest of 2 that meet every limit"),
            finding("openvino-fp32", "pass", "serving", "not applicable", "onnxruntime-fp32 is faster"),
            finding("openvino-int8", "fail", "accuracy", "pass", "0.95, floor 0.85"),
            finding("openvino-int8", "fail", "parity", "fail", "90 % equal answers"),
            finding("tensorrt-fp32", "not executed here", "export", "not executed here", "no TensorRT on this platform"),
        ],
        "seconds": {},
        "report": "report.html",
    }
    lines = told(summary).splitlines()
    assert [line for line in lines if line.startswith("  - ")] == [
        "  - onnxruntime-fp32 serves: the fastest of 2 that meet every limit",
        "  - openvino-int8 cannot serve: parity: 90 % equal answers",
        "  - tensorrt-fp32 cannot serve: export: no TensorRT on this platform",
    ]
    assert "the machine was busy" not in "\n".join(lines)
    summary["engines"]["openvino-int8"]["latency_ms"]["noisy"] = True
    evidence = {"flips": {"won": 3, "lost": 1}, "sentence": "Better than the champion by 1.0 points."}
    busy = told(summary | {"evidence": evidence})
    assert "the machine was busy while openvino-int8 was timed: `train --measure-again`" in busy
    assert "  - Better than the champion by 1.0 points." in busy
    # A rejection has its reasons, which say all of it.
    refused = told(summary | {"outcome": "rejection", "verdict": "fail", "reasons": ["openvino-int8: parity: too few"]})
    assert [line for line in refused.splitlines() if line.startswith("  - ")] == ["  - openvino-int8: parity: too few"]
