"""What other programs make of the server: curl, an agent framework, a test of its OpenAPI description."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Running, running


@pytest.fixture(scope="module")
def served(wide_model_dir: Path) -> Iterator[Running]:
    with running(wide_model_dir, max_tokens=8) as one:
        yield one


def test_curl_gets_a_completion_and_a_stream(served: Running):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    body = {"model": "m", "prompt": "Q:", "max_tokens": 4, "temperature": 0}
    command = [curl, "-sS", f"{served.url}/v1/completions", "-H", "Content-Type: application/json"]
    plain = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, check=True)
    text = json.loads(plain.stdout)["choices"][0]["text"]
    stream = json.dumps(body | {"stream": True})
    lines = subprocess.run([*command, "-N", "-d", stream], capture_output=True, check=True).stdout
    chunks = [
        json.loads(one[6:]) for one in lines.decode().split("\n\n") if one.startswith("data: {")
    ]
    assert "".join(one["choices"][0]["text"] for one in chunks) == text
    missing = subprocess.run(
        [curl, "-sS", f"{served.url}/v1/nothing"], capture_output=True, check=True
    )
    assert json.loads(missing.stdout)["error"]["message"] == "Not Found"


@pytest.mark.slow
def test_an_agent_framework_talks_to_the_server(served: Running):
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIModel(model_id="m", api_base=f"{served.url}/v1", api_key="none")
    question = [{"role": "user", "content": [{"type": "text", "text": "How many apples?"}]}]
    message = model.generate(question, max_tokens=5, stop_sequences=["zzz"])
    assert message.role == "assistant" and isinstance(message.content, str)
    assert message.token_usage.output_tokens <= 5
    streamed = list(model.generate_stream(question, max_tokens=5))
    assert any(one.content for one in streamed)


@pytest.mark.slow
def test_requests_made_from_the_openapi_description_break_nothing(served: Running):
    pytest.importorskip("schemathesis")
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{served.url}/openapi.json",
               "--max-examples", "30", "--seed", "1", "--no-color", "--checks",
               "not_a_server_error,status_code_conformance,content_type_conformance,"
               "response_schema_conformance,negative_data_rejection"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout
    assert served.idle()
