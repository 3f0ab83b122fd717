//! The program itself between servers that fail: whatever breaks and whenever it is killed, each
//! session reaches its right phase, nothing is orphaned and nothing is made twice.

mod api_server;
mod clocks;
mod cut_points;
mod fresh;
mod full_disk;
mod identity_provider;
mod isolation;
mod kubernetes;
mod leadership;
pub mod site;
mod writes;
