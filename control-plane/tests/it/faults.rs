//! The program itself between servers that fail: whatever breaks and whenever it is killed, each
//! session reaches its right phase, nothing is orphaned and nothing is made twice.

mod cut_points;
mod isolation;
mod kubernetes;
mod leadership;
mod site;
