"""pydantic-ai with its default model for OpenAI, OpenAIResponsesModel: text, a tool, a typed output, a stream."""

import asyncio
import importlib.metadata
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    old: bool


async def main(url: str) -> None:
    model = OpenAIResponsesModel("demo", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    agent = Agent(model, instructions="Be brief.", model_settings={"max_tokens": 40, "temperature": 0.5})
    first = await agent.run("def add(")
    second = await agent.run("and then?", message_history=first.all_messages())
    assert isinstance(second.output, str)
    assert second.usage.output_tokens > 0

    typed = Agent(model, output_type=NativeOutput(Person), model_settings={"max_tokens": 200}, retries=3)
    person = (await typed.run("Ada is 36.")).output
    assert isinstance(person, Person)
    by_tool = Agent(
        model, output_type=Person, model_settings={"max_tokens": 400}, retries=3
    )  # tool_choice: required
    history = await by_tool.run("Ada is 36.")
    assert isinstance(history.output, Person)
    again = await by_tool.run("And Bo?", message_history=history.all_messages())
    assert isinstance(again.output, Person)

    async with agent.run_stream("def add(") as stream:
        parts = [part async for part in stream.stream_text(delta=True)]
    assert parts
    print("pydantic-ai", importlib.metadata.version("pydantic-ai-slim"), "ok:", repr("".join(parts))[:60])


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
