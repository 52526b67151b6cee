"""Whether a model tells captions, or pictures, apart that differ in how their parts are put together."""
