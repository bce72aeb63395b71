"""CleanVision's own way over a folder of images, each issue at its default: `python cleanvision_app.py FOLDER WORKERS`."""

from __future__ import annotations

import json
import sys
import time

from cleanvision import Imagelab

if __name__ == "__main__":
    start = time.perf_counter()
    lab = Imagelab(data_path=sys.argv[1])
    lab.find_issues(n_jobs=int(sys.argv[2]), verbose=False)
    seconds = time.perf_counter() - start
    found = {row["issue_type"]: int(row["num_images"]) for _, row in lab.issue_summary.iterrows()}
    print(json.dumps({"seconds": seconds, "issues": found}))
