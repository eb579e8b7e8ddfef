//! What is done to a guest around an instant, and that it is undone whatever happens.

mod scene;

mod instant;

mod freezes;
mod kills;
mod thaws;
