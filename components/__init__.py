"""The stages of the loop and what they share: records and files in, records and files out.

| stage      | takes                          | gives      | writes into its folder                               |
|------------|--------------------------------|------------|------------------------------------------------------|
| validation | images under `data/`           | Dataset    | samples, quarantine, issues (.parquet), data_docs/   |
| splitting  | Dataset, frozen test ledger    | Splits     | splits.parquet                                       |
| training   | Splits                         | Checkpoint | weights.safetensors, history.json                    |
| optimis-   | Checkpoint, Splits             | Checkpoint | weights.safetensors, history.json, fine-tuning.json  |
| ation      |                                |            | (only where a recipe names a pass)                   |
| export     | Checkpoint x target            | Engine     | the engine's own files                               |
| evaluation | Engine x Splits.test           | Evaluation | predictions, beyond_test, slices, corrupted .parquet |
| gating     | Evaluations and Measurements   | Verdict    | nothing but its record                               |
| packaging  | serving engine, Splits         | Release    | engine/, reference.parquet, golden.safetensors       |
| evidence   | engine, champion's Evaluation  | Candidate- | flips.parquet, pictures/, saliency/                  |
|            |                                | Evidence   |                                                      |

No module here knows Prefect, MLflow, Evidently, the environment or a clock (measurement apart).
"""

import sys

# OpenVINO and NNCF report to an analytics service as soon as they are imported, unless a file in the person's home says no.
# Both take a missing reporter for a choice, so it is kept out of every process that imports a component.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
