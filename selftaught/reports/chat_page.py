"""The page of `selftaught serve`, where one can talk to the model."""

import base64
import hashlib
from pathlib import Path

from markupsafe import Markup

from selftaught.reports.pages import rendered


def chat_page(
    model: str, *, chat: bool, one_turn: bool, thoughts: str, tokens: int, key: bool
) -> str:
    """Return the page as HTML.

    Args:
        model: name of the model in requests.
        chat: whether the server answers messages; otherwise the page continues texts.
        one_turn: whether every message is a question of its own.
        thoughts: what the server shows of thoughts: "hidden", "shown" or "summary".
        tokens: number of new tokens that the page asks for at first.
        key: whether requests need a key.
    """
    script = (Path(__file__).parent / "templates/chat.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    about = {
        "hidden": "The server hides the model's thoughts.",
        "summary": "The server shows the number and length of the model's thoughts.",
        "shown": "The model's thoughts are folded above its answers.",
    }[thoughts]
    return rendered(
        "chat.html.j2", title=model, chat=chat, one_turn=one_turn, about=about, tokens=tokens, key=key,
        script=script, script_hash=Markup(f"sha256-{digest}"),
    )  # fmt: skip
