"""Pure row mathematics: divergences, chunked heads, distances; knows no model and no trainer."""
