"""What every operator stands on: tensor views, checks, parameter structs, launches, workspaces."""
