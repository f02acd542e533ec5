"""The engine for programs that speak the Model Context Protocol: `tessera studio --mcp`, at /mcp."""
