//! Responses: those of the driver, and the refusals of keys and tokens.

use http::header::{HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};

pub(crate) use crate::driver::response::{
    Answered, draining, error, error_with, finish, json, method_not_allowed, typed,
};
use crate::gateway::auth::AuthError;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The refusal of [`AuthError`].
pub(crate) fn refused(refusal: AuthError) -> Answered {
    let mut response = typed(refusal.status(), JSON, refusal.body());
    if let Some(challenge) = refusal.www_authenticate() {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    }
    if let Some(seconds) = refusal.retry_after() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(seconds));
    }
    response
}
