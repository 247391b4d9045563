"""All routes of Ollama's API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

from . import embed, generate, models

if TYPE_CHECKING:
    from ..state import State


def router(state: State) -> APIRouter:
    """All routes."""
    routes = APIRouter()
    for part in (generate, embed, models):
        routes.include_router(part.router(state))
    return routes
