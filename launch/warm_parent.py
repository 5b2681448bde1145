"""Imported first by the process that ranks are forked from, for what it does: that process ends with the launcher."""

from __future__ import annotations

from launch.warm import follow_into_death

follow_into_death()
