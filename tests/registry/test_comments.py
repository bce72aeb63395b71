from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from components.contracts.errors import ConfigError
from registry.approval import person
from registry.comments import MAX_TEXT, Comments

ANN = person("Ann Lee", "password")


@pytest.fixture
def url(fresh: Callable[..., str]) -> str:
    return fresh("visionloop_comments")


def test_comments_are_read_as_they_were_written(url: str) -> None:
    comments = Comments(url)
    assert comments.of("m", "1") == []
    script = "<script>alert('1')</script>\r\n\tfür \u202e Ähnliches; DROP TABLE visionloop_comments --  "
    one = comments.add("m", "1", ANN, script)
    others = [comments.add(*of, person("Bob"), "no") for of in (("m", "2"), ("n", "1"))]
    two = comments.add("m", "1", person("Bob"), "x" * MAX_TEXT)
    assert Comments(url).of("m", "1") == [one, two]
    assert [comments.of("m", "2"), comments.of("n", "1")] == [[other] for other in others]
    assert (one.by, one.method, two.method, one.text) == (
        "Ann Lee",
        "password",
        "declared",
        script.replace("\r", "").strip(),
    )
    assert one.at <= two.at
    assert one.id < two.id


@pytest.mark.parametrize("text", ["", " \n\t ", "x" * (MAX_TEXT + 1), "a\x00b", "a\x1bb", "a\ud800b"])
def test_what_is_no_text_is_no_comment(url: str, text: str) -> None:
    comments = Comments(url)
    with pytest.raises(ConfigError, match="a comment"):
        comments.add("m", "1", ANN, text)
    assert comments.of("m", "1") == []


def test_comments_are_only_appended_to_also_at_once(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: Comments(url).add("m", "1", ANN, str(number)), range(12)))
    comments = Comments(url)
    assert sorted(int(comment.text) for comment in comments.of("m", "1")) == list(range(12))
    statements = ["UPDATE visionloop_comments SET text = 'x'", "DELETE FROM visionloop_comments"]
    replacing = "INSERT OR REPLACE INTO visionloop_comments SELECT 1, '', '', '', '', '', ''"
    statements += [replacing] if url.startswith("sqlite") else ["TRUNCATE visionloop_comments"]
    for statement in statements:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), sa.create_engine(url).begin() as connection:
            connection.execute(sa.text(statement))
