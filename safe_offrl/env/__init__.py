"""An environment as everything else sees it: made, held to its contract, identified."""
