"""The regression with a tensor besides that nobody trains, large enough to travel in parts."""

