"""OpenAI Agents SDK with its default model class, OpenAIResponsesModel: text, a tool, a stream, two turns."""

import asyncio
import importlib.metadata
import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    Runner,
    WebSearchTool,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

called = []


@function_tool
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """How the weather is in a city."""
    called.append(city)
    return "sunny"


async def main(url: str) -> None:
    set_default_openai_client(AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    set_tracing_disabled(True)
    short = ModelSettings(extra_body={"stop": ["\n"]})  # an incomplete response would be an error
    plain = Agent(name="plain", instructions="Be brief.", model="demo", model_settings=short)
    result = await Runner.run(plain, "def add(", max_turns=3)
    assert isinstance(result.final_output, str), result
    again = await Runner.run(plain, "and then?", previous_response_id=result.last_response_id)
    assert isinstance(again.final_output, str), again
    longer = await Runner.run(plain, [*result.to_input_list(), {"role": "user", "content": "more"}])
    assert isinstance(longer.final_output, str), longer

    tools = Agent(
        name="tools", model="demo", tools=[weather, WebSearchTool()],
        model_settings=ModelSettings(extra_body={"stop": ["\n"]}, tool_choice="weather"),
    )  # fmt: skip
    result = await Runner.run(tools, "Weather in Rome?", max_turns=4)  # after the call, tool_choice is reset
    assert called, result
    stream = Runner.run_streamed(tools, "Weather in Oslo?", max_turns=4)
    kinds = [event.type async for event in stream.stream_events()]
    assert "raw_response_event" in kinds, kinds
    assert len(called) > 1, kinds
    print("openai-agents", importlib.metadata.version("openai-agents"), "ok:", repr(stream.final_output)[:60])


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
