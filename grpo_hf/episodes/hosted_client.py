"""The client that an environment of the package `verifiers` asks for its turns; imported only where that is installed."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from verifiers.clients import Client  # type: ignore[import-not-found]
from verifiers.errors import OverlongPromptError  # type: ignore[import-not-found]
from verifiers.types import (  # type: ignore[import-not-found]
    Response,
    ResponseMessage,
    Tool,
    ToolCall,
    Usage,
)

from grpo_hf.episodes.hosted import Wanted


class EngineClient(Client):  # type: ignore[misc]
    """Puts turns that are wanted into a queue, and gives back what has been sampled."""

    def __init__(self, turns: asyncio.Queue[Any]):
        super().__init__(turns)
        self.count = 0

    def setup_client(self, config: Any) -> Any:
        """There is nothing to connect to."""
        return config

    async def to_native_tool(self, tool: Tool) -> dict[str, Any]:
        """A schema as chat templates know it."""
        function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        return {"type": "function", "function": function}

    async def to_native_prompt(self, messages: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages as dicts."""
        return [message.model_dump(exclude_none=True) for message in messages], {}

    async def get_native_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: list[Any] | None = None, **kwargs: Any
    ) -> Any:
        """Wait for the engine."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.client.put_nowait(Wanted(prompt, tools or [], reply))
        return await reply

    async def raise_from_native_response(self, response: Any) -> None:
        """The prompt has grown too long."""
        if response is None:
            raise OverlongPromptError

    async def from_native_response(self, response: Any) -> Response:
        """What the model said, as the package has it."""
        said, calls, completion = response
        self.count += 1
        made = [
            ToolCall(id=f"call_{self.count}_{place}", name=call.name, arguments=json.dumps(call.arguments))
            for place, call in enumerate(calls)
        ]
        thinking = next((said[key] for key in ("reasoning_content", "thinking", "reasoning") if said.get(key)), None)
        message = ResponseMessage(
            content=said.get("content") or "",
            reasoning_content=thinking,
            tool_calls=made or None,
            finish_reason="length" if completion.truncated else "tool_calls" if made else "stop",
            is_truncated=completion.truncated,
        )
        tokens = len(completion.ids)
        usage = Usage(prompt_tokens=0, reasoning_tokens=0, completion_tokens=tokens, total_tokens=tokens)
        return Response(id=f"turn_{self.count}", created=int(time.time()), model="policy", usage=usage, message=message)

    async def close(self) -> None:
        """There is nothing to close."""
