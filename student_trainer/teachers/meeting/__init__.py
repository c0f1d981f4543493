"""Who the teachers of a run are: what they say of themselves, before anything is agreed on."""
