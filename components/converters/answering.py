"""The process of a converter: one request of JSON on stdin, one answer of JSON on stdout.

It runs where none of our libraries are, so everything here is Python's own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from components.lifetime import end_with


def answer(convert: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Convert what is asked for and say what came of it; an exception is the answer `error`."""
    # Converters print what they like; only the answer goes to who asked.
    with os.fdopen(os.dup(1), "w") as asker:
        os.dup2(2, 1)
        request = json.loads(sys.stdin.read())
        end_with(request.pop("parent"))
        try:
            found = convert(request)
        except Exception as error:
            # Converters share no exception type; whoever asked gets the sentence, its log the rest.
            traceback.print_exc()
            found = {"error": told(error)}
        print(json.dumps(found), file=asker)


def told(error: Exception) -> str:
    """The first line of what a converter raised, and the operator that torch was at."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0][:300]
    at = re.search(r"While executing .*?target=(?:torch\.ops\.)?([\w.]+)", text)
    return f"{first}, at the operator {at[1]}" if at is not None and at[1] not in first else first
