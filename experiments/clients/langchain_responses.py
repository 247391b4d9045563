"""LangChain's ChatOpenAI with use_responses_api: text, a stream, a tool and its result, a schema, stored turns."""

import importlib.metadata
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    old: bool


@tool
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """How the weather is in a city."""
    return "sunny"


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
ask = {"model": "demo", "base_url": f"{url}/v1", "api_key": "none", "use_responses_api": True, "max_retries": 0}
model, longer = ChatOpenAI(**ask, max_tokens=40), ChatOpenAI(**ask, max_tokens=400, temperature=0.5)
first = model.invoke("def add(")
assert isinstance(first.text, str)
assert first.usage_metadata["output_tokens"] > 0
second = model.invoke("and then?", previous_response_id=first.response_metadata["id"])
assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]
chunks = list(model.stream("def add("))
assert any(chunk.text for chunk in chunks)

asked = HumanMessage("Weather in Rome?")
calling = longer.bind_tools([weather], tool_choice="weather", strict=True).invoke([asked])
assert calling.tool_calls, calling
results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in calling.tool_calls]
assert isinstance(model.bind_tools([weather]).invoke([asked, calling, *results]).text, str)
person = longer.with_structured_output(Person, method="json_schema").invoke("Ada is 36.")
assert isinstance(person, Person)
print("langchain-openai", importlib.metadata.version("langchain-openai"), "ok:", repr(second.text)[:60])
