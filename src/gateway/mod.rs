//! The HTTP edge: who may what, the routes, the page, and where replies come from.

mod apart;
pub mod api;
pub mod auth;
mod body;
pub mod certificate_files;
mod checks;
mod clients;
mod cors;
pub mod deploy;
mod edge;
mod files;
mod http_client;
mod lent;
pub mod metrics_text;
mod openai;
mod pages;
pub mod reload;
mod response;
mod said;
pub mod security;
pub mod serve;
mod status;
mod trace_headers;
mod upgrade;
mod users;
mod watch;
pub mod worker;
