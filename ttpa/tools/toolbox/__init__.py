"""The built-in toolbox: four stateful domains that run offline, seeded, with typed errors."""

from ttpa.tools.toolbox.box import Toolbox
from ttpa.tools.toolbox.tool import Tool, ToolError

__all__ = ["Tool", "ToolError", "Toolbox"]
